"""What pyproject.toml cannot say: the C loops are compiled where there is a compiler."""

import sys

from setuptools import Extension, setup

# Fast mathematics, which CFLAGS may ask for, would take subnormal numbers from the whole process.
NO_FAST_MATH = ["-fno-fast-math", "-fno-unsafe-math-optimizations"]
ROUNDING = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-std=c11", "-O3", *NO_FAST_MATH, *ROUNDING]

setup(
    ext_modules=[
        Extension(
            "polyak.engine._lerp",
            ["src/polyak/engine/lerp.c"],
            extra_compile_args=[] if sys.platform == "win32" else FLAGS,
            extra_link_args=[] if sys.platform == "win32" else NO_FAST_MATH,
            optional=True,  # without it the installation succeeds, and torch's own kernels are used
            py_limited_api=True,
        )
    ],
    # The loops know no Python: one wheel serves every version.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
