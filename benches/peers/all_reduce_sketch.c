// What the plainest code gives: f32 sum in place, with no checks of arguments, no deadlines and nobody who may die. Over
// vectors that all ranks share, three ways, each untuned:
//
//   ring      2(N-1) steps; in each, a rank reads one shard of its left neighbour's vector where it lies
//   direct    a rank adds up its shard of every vector, meets the others, and copies their shards
//   chunked   direct, chunk by chunk, so that what was added is still in the cache when it is copied
//
// Over vectors that are each rank's own, the least that has to be moved, in chunks of 32 KiB, 256 KiB and 1 MiB:
//
//   staged    a rank copies what others add up to memory that all share, adds up its shard of what they have put there, puts
//             the sums there, too, and copies the others' shards
//
// usage: all_reduce_sketch RANKS SECONDS BYTES [private]
// Prints one line: bytes, then for each of the three the median over calls of the slowest rank's time in us, measured as
// `annulus bench` does it; then the number of wrong elements.
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_RANKS = 64, TRIAL_CALLS = 8, FEWEST = 10, MOST = 10000, SPINS = 1000, WAYS = 3 };
enum { CHUNK_BYTES = 256 << 10, STAGED_BYTES = 1 << 20 };

// Shared by all ranks. Flags count up and never come back.
struct board {
    struct { _Alignas(64) _Atomic unsigned step; } flag[MOST_RANKS];
    struct { _Alignas(64) double seconds; } took[MOST_RANKS];
    _Atomic long wrong;
    double median_s[WAYS];
};

static struct board* board;
static float* vectors[MOST_RANKS];
// Terms and sums, two of each by turns: who is a chunk ahead does not write where others still read.
static struct { float* terms[2]; float* sums[2]; } stage[MOST_RANKS];
static int ranks, rank;
static size_t len;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static unsigned step_of(int of) { return atomic_load_explicit(&board->flag[of].step, memory_order_acquire); }

static void wait_for(int of, unsigned step) {
    for (int spins = 0; (int)(step_of(of) - step) < 0; spins++)
        if (spins > SPINS) sched_yield();
}

static void post(void) { atomic_fetch_add_explicit(&board->flag[rank].step, 1, memory_order_release); }

static void meet(void) {
    post();
    unsigned step = step_of(rank);
    for (int other = 0; other < ranks; other++) wait_for(other, step);
}

static size_t begin(size_t from, size_t count, int shard) { return from + count * (size_t)shard / (size_t)ranks; }

static void ring(void) {
    int left = (rank + ranks - 1) % ranks;
    meet();
    // Reduce-scatter, then all-gather: at step s a rank takes shard rank-1-s from its left neighbour.
    for (int s = 0; s < 2 * (ranks - 1); s++) {
        int shard = (rank - 1 - s + 2 * ranks) % ranks, gathers = s >= ranks - 1;
        size_t from = begin(0, len, shard), to = begin(0, len, shard + 1);
        const float* theirs = vectors[left];
        float* mine = vectors[rank];
        if (gathers) {
            memcpy(mine + from, theirs + from, (to - from) * sizeof(float));
        } else {
            for (size_t i = from; i < to; i++) mine[i] += theirs[i];
        }
        post();
        wait_for(left, step_of(rank));
    }
    meet();
}

// Adds up this rank's shard of [from, from + count) and takes the others'.
static void direct_over(size_t from, size_t count) {
    size_t first = begin(from, count, rank), last = begin(from, count, rank + 1);
    float* mine = vectors[rank];
    for (int distance = 1; distance < ranks; distance++) {
        const float* theirs = vectors[(rank + distance) % ranks];
        for (size_t i = first; i < last; i++) mine[i] += theirs[i];
    }
    meet();
    for (int distance = 1; distance < ranks; distance++) {
        int other = (rank + distance) % ranks;
        size_t at = begin(from, count, other), end = begin(from, count, other + 1);
        memcpy(mine + at, vectors[other] + at, (end - at) * sizeof(float));
    }
}

static void direct(void) {
    meet();
    direct_over(0, len);
    meet();
}

static void chunked(void) {
    size_t chunk = CHUNK_BYTES / sizeof(float);
    meet();
    for (size_t from = 0; from < len; from += chunk) direct_over(from, len - from < chunk ? len - from : chunk);
    meet();
}

static void staged_over(size_t from, size_t count) {
    static unsigned turns;
    unsigned turn = turns++ % 2;
    float *mine = vectors[rank] + from, *terms = stage[rank].terms[turn], *sums = stage[rank].sums[turn];
    size_t first = begin(0, count, rank), last = begin(0, count, rank + 1);
    memcpy(terms, mine, first * sizeof(float));
    memcpy(terms + last, mine + last, (count - last) * sizeof(float));
    meet();
    for (int distance = 1; distance < ranks; distance++) {
        const float* theirs = stage[(rank + distance) % ranks].terms[turn];
        for (size_t i = first; i < last; i++) mine[i] += theirs[i];
    }
    memcpy(sums, mine + first, (last - first) * sizeof(float));
    meet();
    for (int distance = 1; distance < ranks; distance++) {
        int other = (rank + distance) % ranks;
        size_t at = begin(0, count, other), end = begin(0, count, other + 1);
        memcpy(mine + at, stage[other].sums[turn], (end - at) * sizeof(float));
    }
}

static void staged(size_t chunk_bytes) {
    size_t chunk = chunk_bytes / sizeof(float);
    for (size_t from = 0; from < len; from += chunk) staged_over(from, len - from < chunk ? len - from : chunk);
}

static void staged_small(void) { staged(32 << 10); }
static void staged_middle(void) { staged(256 << 10); }
static void staged_large(void) { staged(STAGED_BYTES); }

static void (*const over_shared[WAYS])(void) = { ring, direct, chunked };
static void (*const over_private[WAYS])(void) = { staged_small, staged_middle, staged_large };
static void (*const* way)(void) = over_shared;

static int ascending(const void* left, const void* right) {
    double a = *(const double*)left, b = *(const double*)right;
    return (a > b) - (a < b);
}

// The slowest rank's seconds of `calls` calls, on rank 0, sorted.
static void run(int which, int calls, double* slowest) {
    for (int call = 0; call < calls; call++) {
        meet();
        double start = now();
        way[which]();
        board->took[rank].seconds = now() - start;
        meet();
        slowest[call] = 0;
        for (int other = 0; other < ranks; other++)
            if (board->took[other].seconds > slowest[call]) slowest[call] = board->took[other].seconds;
    }
    qsort(slowest, (size_t)calls, sizeof *slowest, ascending);
}

static int at_most(double calls, int fewest, int most) {
    return calls < fewest ? fewest : calls > most ? most : (int)calls;
}

static void work(double seconds) {
    double* slowest = malloc(MOST * sizeof *slowest);
    if (!slowest) _exit(1);
    float* mine = vectors[rank];
    for (int which = 0; which < WAYS; which++) {
        for (size_t i = 0; i < len; i++) mine[i] = (float)((i * 31 + (size_t)rank * 7) % 257);
        way[which]();
        for (size_t i = 0; i < len; i++) {
            float expected = 0;
            for (int r = 0; r < ranks; r++) expected += (float)((i * 31 + (size_t)r * 7) % 257);
            if (mine[i] != expected) atomic_fetch_add(&board->wrong, 1);
        }
        meet();
        memset(mine, 0, len * sizeof(float)); // sums of zeroes stay what they are
        // Everybody sees the same times, so everybody makes the same number of calls.
        run(which, TRIAL_CALLS, slowest);
        double estimate = slowest[TRIAL_CALLS / 2] > 1e-9 ? slowest[TRIAL_CALLS / 2] : 1e-9;
        run(which, at_most(0.1 * seconds / estimate, 1, MOST), slowest);
        int calls = at_most(seconds / estimate, FEWEST, MOST);
        run(which, calls, slowest);
        if (rank == 0) board->median_s[which] = slowest[calls / 2];
    }
}

static void* shared(size_t bytes) {
    void* at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        perror("all_reduce_sketch: mmap");
        exit(1);
    }
    return at;
}

int main(int argc, char** argv) {
    int is_private = argc == 5 && strcmp(argv[4], "private") == 0, is_usage = argc == 4 || is_private;
    ranks = is_usage ? atoi(argv[1]) : 0;
    size_t bytes = is_usage ? strtoull(argv[3], NULL, 10) : 0;
    len = bytes / sizeof(float);
    if (ranks < 1 || ranks > MOST_RANKS || len == 0) {
        fprintf(stderr, "usage: all_reduce_sketch RANKS SECONDS BYTES [private]\n");
        return 2;
    }
    board = shared(sizeof *board);
    if (is_private) {
        way = over_private;
        for (int r = 0; r < ranks; r++) {
            for (int turn = 0; turn < 2; turn++) {
                stage[r].terms[turn] = shared(STAGED_BYTES);
                stage[r].sums[turn] = shared(STAGED_BYTES / (size_t)ranks + 4096);
            }
        }
    }
    // A page more for each, so that equal places of two vectors have different low address bits.
    for (int r = 0; r < ranks; r++) vectors[r] = shared(bytes + 4096 * (size_t)(r + 1));
    for (rank = 0; rank < ranks; rank++) {
        if (fork() == 0) {
            work(atof(argv[2]));
            _exit(0);
        }
    }
    int failed = 0;
    for (int status; wait(&status) > 0;) failed |= status;
    if (failed) return 1;
    printf("%zu", bytes);
    for (int which = 0; which < WAYS; which++) printf(" %.3f", board->median_s[which] * 1e6);
    printf(" %ld\n", atomic_load(&board->wrong));
    return 0;
}
