/* The limit: what the machine can do with the bytes of an update when they lie in one buffer.

   Two loops over the same number of bytes: the mixing itself, without tensors, names or guard, and
   the triad of the STREAM benchmark. A range is split evenly over threads that sleep in between. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MOST_THREADS 64

enum kind { FLOAT32, BFLOAT16, TRIAD };

struct job {
    enum kind kind;
    float *target;
    const void *source;
    const float *other;
    float weight;
    size_t length;
    int threads;
};

static void part(const struct job *job, int index)
{
    size_t first = job->length * index / job->threads;
    size_t last = job->length * (index + 1) / job->threads;
    float *restrict target = job->target;
    float weight = job->weight;
    if (job->kind == FLOAT32) {
        const float *restrict source = job->source;
        for (size_t i = first; i < last; i++)
            target[i] += weight * (source[i] - target[i]);
    } else if (job->kind == BFLOAT16) {
        const uint16_t *restrict source = job->source;
        for (size_t i = first; i < last; i++) {
            uint32_t bits = (uint32_t)source[i] << 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            target[i] += weight * (value - target[i]);
        }
    } else {
        const float *restrict source = job->source, *restrict other = job->other;
        for (size_t i = first; i < last; i++)
            target[i] = source[i] + weight * other[i];
    }
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t begin = PTHREAD_COND_INITIALIZER, end = PTHREAD_COND_INITIALIZER;
static struct job current;
static unsigned long turn;
static int started = 1, pending;

static void *worker(void *argument)
{
    int index = (int)(intptr_t)argument;
    unsigned long seen = 0;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (turn == seen)
            pthread_cond_wait(&begin, &lock);
        seen = turn;
        struct job job = current;
        pthread_mutex_unlock(&lock);
        if (index >= job.threads)
            continue;
        part(&job, index);
        pthread_mutex_lock(&lock);
        if (--pending == 0)
            pthread_cond_signal(&end);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

/* Returns 0, or -1 where the threads cannot be had. */
int run(int kind, float *target, const void *source, const float *other, float weight,
        size_t length, int threads)
{
    struct job job = {kind, target, source, other, weight, length, threads};
    if (threads < 1 || threads > MOST_THREADS)
        return -1;
    if (threads > 1) {
        pthread_mutex_lock(&lock);
        for (; started < threads; started++) {
            pthread_t thread;
            if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)started)) {
                pthread_mutex_unlock(&lock);
                return -1;
            }
        }
        current = job;
        pending = threads - 1;
        turn++;
        pthread_cond_broadcast(&begin);
        pthread_mutex_unlock(&lock);
    }
    part(&job, 0);
    if (threads > 1) {
        pthread_mutex_lock(&lock);
        while (pending)
            pthread_cond_wait(&end, &lock);
        pthread_mutex_unlock(&lock);
    }
    return 0;
}
