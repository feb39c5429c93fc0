/* One pass over memory:  target += weight * (source - target),  where the result is finite.
 *
 * Plain C over raw pointers: no torch, no Python, no threads of its own. Many threads may run one
 * job together: each takes the next piece of it, a range of bytes, until none is left.
 *
 * The arithmetic is that of torch.lerp, bit for bit: below one half
 *     target + weight * (source - target),        else   source + (weight - 1) * (source - target),
 * with one rounding for the product and the sum where torch has a fused multiply-add, and two where
 * it has none. Compiled with -ffp-contract=off, so that neither is made into the other.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__)
#error "needs GCC or Clang; without this file polyak uses torch's own kernels"
#endif

#define PUBLIC __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16; /* the upper half of a float */
typedef uint16_t fp16; /* IEEE 754 binary16 */

typedef struct {
    int64_t tensors;
    void *const *targets;
    const void *const *sources;
    const int64_t *ends; /* of each tensor, in elements, counted through all of them */
    int64_t piece;       /* elements that a thread takes at a time */
    double weight;
    int64_t *skipped; /* counts elements that kept their value */
    int64_t next;     /* the first element that no thread has taken */
    int32_t kind;     /* of the loops */
    int32_t source;   /* 0 float, 1 bfloat16, 2 float16, 3 double; targets are float, or double */
} job;

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE uint64_t bits_of_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float from_float(float value) { return value; }
INLINE double from_double(double value) { return value; }
INLINE float from_bf16(bf16 value) { return as_float((uint32_t)value << 16); }

/* Shift the exponent and the fraction to their places in a float; the two ends of the scale, where
 * that is not all, are an infinity or NaN (add to the exponent), and the subnormal numbers (the
 * fraction counts 2^-24). */
INLINE float from_fp16(fp16 value) {
    const uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    const uint32_t rest = value & 0x7fffu;
    const uint32_t shifted = (rest << 13) + ((127u - 15u) << 23);
    const uint32_t special = shifted + ((255u - 31u - (127u - 15u)) << 23);
    const uint32_t small = bits_of((float)(int32_t)rest * 0x1p-24f);
    const uint32_t magnitude = rest >= 0x7c00u ? special : (rest < 0x0400u ? small : shifted);
    return as_float(sign | magnitude);
}

INLINE int finite_float(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }
INLINE int finite_double(double value) {
    const uint64_t exponent = 0x7ffull << 52;
    return (bits_of_double(value) & exponent) != exponent;
}

#define FUSED_float(a, b, c) __builtin_fmaf(a, b, c)
#define FUSED_double(a, b, c) __builtin_fma(a, b, c)
#define TWICE_float(a, b, c) ((a) * (b) + (c))
#define TWICE_double(a, b, c) ((a) * (b) + (c))

/* Counts are kept narrow in the inner loop, so that it has as many of them as values in a vector. */
enum { RUN = 1 << 12 };

#define EACH(TYPE, COUNT, FROM, RESULT)                                                           \
    for (; length > 0; target += RUN, source += RUN, length -= RUN) {                             \
        const int64_t run = length < RUN ? length : RUN;                                          \
        COUNT odd = 0;                                                                            \
        for (int64_t i = 0; i < run; i++) {                                                       \
            const TYPE t = target[i], s = FROM(source[i]);                                        \
            const TYPE result = RESULT;                                                           \
            const int finite = finite_##TYPE(result);                                             \
            target[i] = finite ? result : t;                                                      \
            odd += !finite;                                                                       \
        }                                                                                         \
        skipped += (int64_t)odd;                                                                  \
    }

#define LOOP(NAME, TYPE, COUNT, SOURCE, FMA, WHERE)                                               \
    WHERE static int64_t NAME(void *targets, const void *sources, int64_t length, double share) { \
        TYPE *restrict target = targets;                                                          \
        const SOURCE *restrict source = sources;                                                  \
        const TYPE weight = (TYPE)share;                                                          \
        int64_t skipped = 0;                                                                      \
        if (weight < (TYPE)0.5) {                                                                 \
            EACH(TYPE, COUNT, from_##SOURCE, FMA##_##TYPE(weight, s - t, t))                      \
        } else {                                                                                  \
            const TYPE back = weight - 1;                                                         \
            EACH(TYPE, COUNT, from_##SOURCE, FMA##_##TYPE(back, s - t, s))                        \
        }                                                                                         \
        return skipped;                                                                           \
    }

#define LOOPS(NAME, FMA, WHERE)                                                                   \
    LOOP(NAME##_float, float, uint32_t, float, FMA, WHERE)                                        \
    LOOP(NAME##_bf16, float, uint32_t, bf16, FMA, WHERE)                                          \
    LOOP(NAME##_fp16, float, uint32_t, fp16, FMA, WHERE)                                          \
    LOOP(NAME##_double, double, uint64_t, double, FMA, WHERE)

typedef int64_t (*loop)(void *, const void *, int64_t, double);

#define ROW(NAME) {NAME##_float, NAME##_bf16, NAME##_fp16, NAME##_double}

LOOPS(twice, TWICE, )

#if defined(__x86_64__) || defined(__i386__)
LOOPS(avx2, FUSED, __attribute__((target("avx2,fma"))))
LOOPS(avx512, FUSED, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))
static const loop loops[3][4] = {ROW(twice), ROW(avx2), ROW(avx512)};
static int runs_here(int kind) {
    __builtin_cpu_init();
    if (kind == 1)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (kind == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return kind == 0;
}
#elif defined(__aarch64__)
LOOPS(neon, FUSED, ) /* a fused multiply-add is part of every such processor */
static const loop loops[2][4] = {ROW(twice), ROW(neon)};
static int runs_here(int kind) { return kind == 0 || kind == 1; }
#else
static const loop loops[1][4] = {ROW(twice)};
static int runs_here(int kind) { return kind == 0; }
#endif

/* Whether this processor runs the loops of a kind: 0 rounds twice, those from 1 on round once. */
PUBLIC int polyak_runs(int kind) { return runs_here(kind); }

static int64_t take(int64_t *from, int64_t count) {
    return __atomic_fetch_add(from, count, __ATOMIC_RELAXED);
}

/* Take pieces of a job until none is left. */
PUBLIC void polyak_lerp(job *work) {
    static const int64_t target_bytes[4] = {4, 4, 4, 8}, source_bytes[4] = {4, 2, 2, 8};
    const int source = work->source;
    const loop run = loops[work->kind][source];
    const int64_t end = work->tensors ? work->ends[work->tensors - 1] : 0;
    int64_t skipped = 0;
    for (;;) {
        int64_t at = take(&work->next, work->piece);
        if (at >= end)
            break;
        const int64_t stop = end - at < work->piece ? end : at + work->piece;
        int64_t low = 0, high = work->tensors - 1; /* find the tensor that `at` is in */
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (work->ends[middle] <= at)
                low = middle + 1;
            else
                high = middle;
        }
        for (int64_t i = low; at < stop; i++) {
            const int64_t start = at - (i ? work->ends[i - 1] : 0);
            const int64_t length = (work->ends[i] < stop ? work->ends[i] : stop) - at;
            skipped += run((char *)work->targets[i] + start * target_bytes[source],
                           (const char *)work->sources[i] + start * source_bytes[source], length,
                           work->weight);
            at += length;
        }
    }
    if (skipped)
        take(work->skipped, skipped);
}

/* Whether objects that hold pointers are, word for word, what they were; or, with `take`, note what
 * they are. `places` has `objects` addresses for each of `count` things, one object leading to the
 * next: no address is read before the object that leads to it is known to be the same. */
PUBLIC int polyak_same(int64_t count, int64_t objects, const uint64_t *const *places,
                       const int64_t *words, uint64_t *noted, int take) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t object = 0; object < objects; object++) {
            const uint64_t *now = *places++;
            uint64_t changed = 0;
            for (int64_t word = 0; word < words[object]; word++) {
                changed |= now[word] ^ noted[word];
                if (take)
                    noted[word] = now[word];
            }
            if (changed && !take)
                return 0;
            noted += words[object];
        }
    return 1;
}
