/* writer: the guest's write load and its witness.
 *
 *   writer row HEARTBEAT PAUSE_US FILE...          the witness over two disks or more
 *   writer single FILE PAUSE_US                    the same records on one disk more
 *   writer dirty DIR MIB                           random rewrites that nobody syncs
 *   writer check FILE                              print "records=N torn=T bad=B"
 *
 * row: for i = last+1, last+2, ... append record i to A, fdatasync; append it to B, fdatasync; and so on; tell the host
 * "i nanoseconds". So at every instant the durable state has last(A) >= last(B) >= ... >= last(A)-1, and so must images
 * that were cut together.
 * A record is 64 bytes, so that one that was cut in half is visible.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define RECORD 64

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t monotonic(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int open_log(const char *path) {
    int fd = open(path, O_RDWR | O_CREAT | O_APPEND, 0644);
    if (fd < 0) die(path);
    return fd;
}

static uint64_t last_record(int fd) {
    struct stat st;
    char r[RECORD + 1] = {0};
    if (fstat(fd, &st) || st.st_size < RECORD) return 0;
    if (pread(fd, r, RECORD, st.st_size / RECORD * RECORD - RECORD) != RECORD) return 0;
    return strtoull(r, 0, 10);
}

static void append(int fd, uint64_t i) {
    char r[RECORD + 1];
    snprintf(r, sizeof r, "%020llu %020llu %020u\n", (unsigned long long)i, (unsigned long long)monotonic(),
             (unsigned)(i * 2654435761u));
    r[RECORD - 1] = '\n';
    if (write(fd, r, RECORD) != RECORD) die("writer: write");
    if (fdatasync(fd)) die("writer: fdatasync");
}

static _Noreturn void row(const char *heartbeat, int pause_us, char **paths, int count) {
    int fds[count], hb = open(heartbeat, O_WRONLY | O_NONBLOCK);
    for (int k = 0; k < count; k++) fds[k] = open_log(paths[k]);
    uint64_t last = last_record(fds[0]);
    /* a crash within a round leaves the first ones one ahead: give the others what they missed, so that all stay gapless */
    for (int k = 1; k < count; k++)
        if (last == last_record(fds[k]) + 1) append(fds[k], last);
    for (uint64_t i = last + 1;; i++) {
        char line[64];
        for (int k = 0; k < count; k++) append(fds[k], i);
        int n = snprintf(line, sizeof line, "%llu %llu\n", (unsigned long long)i, (unsigned long long)monotonic());
        /* nobody may be listening, and then the port is full: a lost heartbeat must not stop the load */
        if (hb >= 0 && write(hb, line, n) < 0) { }
        if (pause_us) usleep(pause_us);
    }
}

static _Noreturn void single(const char *path, int pause_us) {
    int fd = open_log(path);
    for (uint64_t i = last_record(fd) + 1;; i++) {
        append(fd, i);
        if (pause_us) usleep(pause_us);
    }
}

static _Noreturn void dirty(const char *directory, int mib) {
    char path[512], block[4096];
    snprintf(path, sizeof path, "%s/dirty.bin", directory);
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0 || ftruncate(fd, (off_t)mib << 20)) die(path);
    unsigned blocks = (unsigned)mib * 256, seed = 12345;
    for (;;) {
        for (int k = 0; k < 64; k++) {
            seed = seed * 1664525u + 1013904223u;
            memset(block, seed >> 24, sizeof block);
            if (pwrite(fd, block, sizeof block, (off_t)((seed >> 8) % blocks) * 4096) < 0) die("writer: pwrite");
        }
        usleep(20000);
    }
}

static int check(const char *path) {
    FILE *f = fopen(path, "r");
    if (!f) die(path);
    char r[RECORD + 1] = {0};
    uint64_t records = 0, bad = 0;
    size_t n;
    while ((n = fread(r, 1, RECORD, f)) == RECORD) {
        records++;
        if (strtoull(r, 0, 10) != records || strtoull(r + 42, 0, 10) != (unsigned)(records * 2654435761u)) bad++;
    }
    printf("records=%llu torn=%zu bad=%llu\n", (unsigned long long)records, n, (unsigned long long)bad);
    return 0;
}

int main(int c, char **v) {
    if (c >= 6 && !strcmp(v[1], "row")) row(v[2], atoi(v[3]), v + 4, c - 4);
    if (c == 4 && !strcmp(v[1], "single")) single(v[2], atoi(v[3]));
    if (c == 4 && !strcmp(v[1], "dirty")) dirty(v[2], atoi(v[3]));
    if (c == 3 && !strcmp(v[1], "check")) return check(v[2]);
    fprintf(stderr, "usage: writer row HEARTBEAT PAUSE_US A B... | single FILE PAUSE_US | dirty DIR MIB | check FILE\n");
    return 2;
}
