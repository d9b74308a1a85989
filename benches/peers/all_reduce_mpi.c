// MPI_Allreduce: f32 sum in place, measured as `annulus bench` does it.
//
// usage: all_reduce_mpi SECONDS BYTES...
// Rank 0 prints one line a size: bytes, median of the slowest rank's time in us, iterations, wrong elements.
#include <math.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

enum { TRIAL_CALLS = 8, FEWEST = 10, MOST = 10000 };

static void fail(const char* what) {
    fprintf(stderr, "all_reduce_mpi: %s\n", what);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static int ascending(const void* left, const void* right) {
    double a = *(const double*)left, b = *(const double*)right;
    return (a > b) - (a < b);
}

// What rank `rank` puts in at `index`: small integers, so that every order of summation is exact.
static float input(int rank, size_t index) {
    return (float)((index * 31 + (size_t)rank * 7) % 257);
}

static long wrong_elements(float* data, int count, int ranks, int rank) {
    for (int i = 0; i < count; i++) data[i] = input(rank, (size_t)i);
    if (MPI_Allreduce(MPI_IN_PLACE, data, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD)) fail("MPI_Allreduce");
    long wrong = 0, all = 0;
    for (int i = 0; i < count; i++) {
        float expected = 0;
        for (int r = 0; r < ranks; r++) expected += input(r, (size_t)i);
        wrong += data[i] != expected;
    }
    MPI_Allreduce(&wrong, &all, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
    return all;
}

// Fills slowest[calls] with the slowest rank's seconds, call by call, on every rank.
static void run(float* data, int count, int calls, double* own, double* slowest) {
    for (int i = 0; i < calls; i++) {
        MPI_Barrier(MPI_COMM_WORLD);
        double start = MPI_Wtime();
        MPI_Allreduce(MPI_IN_PLACE, data, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        own[i] = MPI_Wtime() - start;
    }
    MPI_Allreduce(own, slowest, calls, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    qsort(slowest, (size_t)calls, sizeof *slowest, ascending);
}

int main(int argc, char** argv) {
    int rank, ranks;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (argc < 3) fail("usage: all_reduce_mpi SECONDS BYTES...");
    double seconds = atof(argv[1]);
    double* own = malloc(MOST * sizeof *own);
    double* slowest = malloc(MOST * sizeof *slowest);
    for (int argument = 2; argument < argc; argument++) {
        size_t bytes = strtoull(argv[argument], NULL, 10);
        int count = (int)(bytes / sizeof(float));
        float* data = NULL;
        if (posix_memalign((void**)&data, 4096, bytes ? bytes : 1) || !own || !slowest) fail("no memory");
        long wrong = wrong_elements(data, count, ranks, rank);
        for (int i = 0; i < count; i++) data[i] = 0; // sums of zeroes stay what they are
        run(data, count, TRIAL_CALLS, own, slowest);
        double estimate = fmax(slowest[TRIAL_CALLS / 2], 1e-9);
        int warmup = (int)fmin(0.1 * seconds / estimate, MOST);
        if (warmup) run(data, count, warmup, own, slowest);
        int calls = (int)fmin(fmax(seconds / estimate, FEWEST), MOST);
        run(data, count, calls, own, slowest);
        if (!rank) printf("%zu %.3f %d %ld\n", bytes, slowest[calls / 2] * 1e6, calls, wrong);
        fflush(stdout);
        free(data);
    }
    free(own);
    free(slowest);
    MPI_Finalize();
    return 0;
}
