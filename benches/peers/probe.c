// What the machine gives right now, for P processes at once.
//
// usage: probe PROCESSES BYTES...
// First line: "line NS", the one-way time of a cache line between two cores, pinned to the first two that this process may
// use (0 with one core). Then a line for each size, "floor BYTES COPY_US ADD_US": the time from the first start to the last
// end of P processes, each of which moves what a rank of an all-reduce of BYTES must move (it reads BYTES and writes BYTES),
// at the bandwidth of memcpy and of `a[i] += b[i]`.
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

enum { ROUND_TRIPS = 20000, REPETITIONS = 9, MOST_PROCESSES = 64 };

// Shared by all processes.
struct board {
    _Atomic int ball;
    _Atomic int arrived;
    struct { double start, end; } span[MOST_PROCESSES];
    double result_s[2];
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void pin(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
}

// Release: what came before is seen by whoever sees the ball; acquire is its partner.
static void pass(struct board* board, int ball) { atomic_store_explicit(&board->ball, ball, memory_order_release); }
static void catch_ball(struct board* board, int ball) {
    while (atomic_load_explicit(&board->ball, memory_order_acquire) != ball) {}
}

static double line_ns(struct board* board) {
    cpu_set_t allowed;
    int cores[2], found = 0;
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int core = 0; core < CPU_SETSIZE && found < 2; core++)
        if (CPU_ISSET(core, &allowed)) cores[found++] = core;
    if (found < 2) return 0;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        pin(cores[1]);
        for (int i = 0; i < ROUND_TRIPS; i++) {
            catch_ball(board, 2 * i + 1);
            pass(board, 2 * i + 2);
        }
        _exit(0);
    }
    pin(cores[0]);
    double start = now();
    for (int i = 0; i < ROUND_TRIPS; i++) {
        pass(board, 2 * i + 1);
        catch_ball(board, 2 * i + 2);
    }
    double seconds = now() - start;
    waitpid(child, NULL, 0);
    sched_setaffinity(0, sizeof allowed, &allowed);
    return seconds / ROUND_TRIPS / 2 * 1e9;
}

static void meet(struct board* board, int processes, int meeting) {
    atomic_fetch_add(&board->arrived, 1);
    while (atomic_load(&board->arrived) < processes * meeting) sched_yield();
}

static int ascending(const void* left, const void* right) {
    double a = *(const double*)left, b = *(const double*)right;
    return (a > b) - (a < b);
}

enum kind { COPY, ADD };

// Process 0 leaves the median time of one call in `*result_s`.
static void move(struct board* board, int process, int processes, size_t bytes, enum kind kind, double* result_s) {
    size_t pages = (bytes + 4095) / 4096 * 4096;
    float *to = aligned_alloc(4096, pages), *from = aligned_alloc(4096, pages);
    if (!to || !from) _exit(1);
    memset(to, 0, bytes);
    memset(from, 0, bytes);
    int calls = (int)((64u << 20) / bytes) + 1; // long enough for the clock and for the scheduler
    int meeting = 0;
    double seconds[REPETITIONS];
    for (int repetition = 0; repetition < REPETITIONS; repetition++) {
        meet(board, processes, ++meeting);
        board->span[process].start = now();
        for (int call = 0; call < calls; call++) {
            if (kind == COPY) {
                memcpy(to, from, bytes);
            } else {
                for (size_t i = 0; i < bytes / sizeof(float); i++) to[i] += from[i];
            }
            __asm__ volatile("" : : "r"(to) : "memory");
        }
        board->span[process].end = now();
        meet(board, processes, ++meeting);
        double first = board->span[0].start, last = board->span[0].end;
        for (int other = 1; other < processes; other++) {
            if (board->span[other].start < first) first = board->span[other].start;
            if (board->span[other].end > last) last = board->span[other].end;
        }
        seconds[repetition] = (last - first) / calls;
        meet(board, processes, ++meeting);
    }
    qsort(seconds, REPETITIONS, sizeof *seconds, ascending);
    if (process == 0) *result_s = seconds[REPETITIONS / 2];
}

int main(int argc, char** argv) {
    int processes = argc > 1 ? atoi(argv[1]) : 0;
    if (processes < 1 || processes > MOST_PROCESSES) {
        fprintf(stderr, "usage: probe PROCESSES BYTES...\n");
        return 2;
    }
    struct board* board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (board == MAP_FAILED) return 1;
    printf("line %.1f\n", line_ns(board));
    for (int argument = 2; argument < argc; argument++) {
        size_t bytes = strtoull(argv[argument], NULL, 10);
        if (bytes < sizeof(float)) continue;
        fflush(stdout);
        for (int kind = COPY; kind <= ADD; kind++) {
            atomic_store(&board->arrived, 0);
            for (int process = 0; process < processes; process++) {
                if (fork() == 0) {
                    move(board, process, processes, bytes, (enum kind)kind, &board->result_s[kind]);
                    _exit(0);
                }
            }
            int failed = 0;
            for (int status; wait(&status) > 0;) failed |= status;
            if (failed) return 1;
        }
        // memcpy moves 2 bytes for each of its size, the addition 3; the all-reduce must move 2.
        printf("floor %zu %.3f %.3f\n", bytes, board->result_s[COPY] * 1e6, board->result_s[ADD] * 1e6 * 2 / 3);
    }
    return 0;
}
