/* Faults of the disk, for tests: the K-th change to a file under a folder fails, or the process dies there.

   gcc -shared -fPIC -o faults.so disk_faults.c -ldl; then, with LD_PRELOAD=faults.so:
   FAULT_UNDER   the folder (a prefix of paths); nothing elsewhere is touched
   FAULT_COUNT   a file of 8 bytes that all processes share: how many changes there have been
   FAULT_LOG     a file to which each fault is added: "write /path"
   FAULT_FIRST, FAULT_LAST   the changes that fail, from 1
   FAULT_HOW     an error number, or 0: kill -9

   Changes are what a crash or a full disk can come between: files made or opened to write, bytes written, synced,
   cut, renamed, linked, deleted, folders made and deleted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static __thread int inside;

/* Whether this change fails; the error number is then in errno. */
static int fails(const char *what, const char *path) {
    const char *under = getenv("FAULT_UNDER"), *counter = getenv("FAULT_COUNT");
    if (inside || !under || !counter || !path || strncmp(path, under, strlen(under)) != 0) return 0;
    int before = errno;
    /* Straight to the kernel: nothing here may come back to the functions below. */
    int file = syscall(SYS_openat, AT_FDCWD, counter, O_RDWR, 0);
    if (file < 0) return 0;
    uint64_t *count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (count == MAP_FAILED) { errno = before; return 0; }
    uint64_t now = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
    munmap(count, sizeof *count);
    const char *first = getenv("FAULT_FIRST"), *last = getenv("FAULT_LAST"), *how = getenv("FAULT_HOW");
    if (!first || !last || !how || now < strtoull(first, NULL, 10) || now > strtoull(last, NULL, 10)) {
        errno = before;
        return 0;
    }
    const char *log = getenv("FAULT_LOG");
    if (log) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s %s\n", what, path);
        int notes = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0644);
        syscall(SYS_write, notes, line, size);
        syscall(SYS_close, notes);
    }
    int number = atoi(how);
    if (!number) syscall(SYS_kill, getpid(), SIGKILL);
    errno = number;
    return 1;
}

static int fails_fd(const char *what, int file) {
    char link[64], path[PATH_MAX];
    if (inside || !getenv("FAULT_UNDER")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t size = syscall(SYS_readlink, link, path, sizeof path - 1);
    errno = before;
    if (size <= 0) return 0;
    path[size] = 0;
    return fails(what, path);
}

/* An absolute path of a name; programs here name files absolutely or from their own folder. */
static const char *whole(const char *name, char *room) {
    if (!name || name[0] == '/') return name;
    char here[PATH_MAX];
    if (syscall(SYS_getcwd, here, sizeof here) < 0) return name;
    snprintf(room, 2 * PATH_MAX, "%s/%s", here, name);
    return room;
}

static int fails_at(const char *what, int folder, const char *name) {
    char room[PATH_MAX * 2], link[64];
    if (!name || inside || !getenv("FAULT_UNDER")) return 0;
    if (name[0] == '/' || folder == AT_FDCWD) return fails(what, whole(name, room));
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    int before = errno;
    ssize_t size = syscall(SYS_readlink, link, room, PATH_MAX);
    errno = before;
    if (size <= 0) return 0;
    snprintf(room + size, sizeof room - size, "/%s", name);
    return fails(what, room);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define WRITES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
#define OPEN(name) int name(const char *path, int flags, ...) { \
    REAL(name); mode_t mode = 0; char room[PATH_MAX * 2]; \
    if (flags & O_CREAT) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
    if ((flags & WRITES) && fails("open", whole(path, room))) return -1; \
    return real(path, flags, mode); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    REAL(name); mode_t mode = 0; \
    if (flags & O_CREAT) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
    if ((flags & WRITES) && fails_at("open", folder, path)) return -1; \
    return real(folder, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) FILE *name(const char *path, const char *mode) { \
    REAL(name); char room[PATH_MAX * 2]; \
    if (strpbrk(mode, "wa+") && fails("open", whole(path, room))) return NULL; \
    return real(path, mode); }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *data, size_t size) {
    REAL(write); return fails_fd("write", file) ? -1 : real(file, data, size); }
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev); return fails_fd("write", file) ? -1 : real(file, parts, count); }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    REAL(pwrite); return fails_fd("write", file) ? -1 : real(file, data, size, at); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    REAL(pwrite64); return fails_fd("write", file) ? -1 : real(file, data, size, at); }
ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    REAL(sendfile); return fails_fd("write", to) ? -1 : real(to, from, at, size); }
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    REAL(sendfile64); return fails_fd("write", to) ? -1 : real(to, from, at, size); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
    REAL(copy_file_range); return fails_fd("write", to) ? -1 : real(from, a, to, b, size, flags); }
int fsync(int file) { REAL(fsync); return fails_fd("sync", file) ? -1 : real(file); }
int fdatasync(int file) { REAL(fdatasync); return fails_fd("sync", file) ? -1 : real(file); }
int ftruncate(int file, off_t size) { REAL(ftruncate); return fails_fd("cut", file) ? -1 : real(file, size); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); return fails_fd("cut", file) ? -1 : real(file, size); }
int rename(const char *from, const char *to) {
    REAL(rename); char room[PATH_MAX * 2]; return fails("rename", whole(to, room)) ? -1 : real(from, to); }
int link(const char *from, const char *to) {
    REAL(link); char room[PATH_MAX * 2]; return fails("link", whole(to, room)) ? -1 : real(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat); return fails_at("link", b, to) ? -1 : real(a, from, b, to, flags); }
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat); return fails_at("rename", b, to) ? -1 : real(a, from, b, to); }
int unlink(const char *path) {
    REAL(unlink); char room[PATH_MAX * 2]; return fails("delete", whole(path, room)) ? -1 : real(path); }
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat); return fails_at("delete", folder, path) ? -1 : real(folder, path, flags); }
int rmdir(const char *path) {
    REAL(rmdir); char room[PATH_MAX * 2]; return fails("delete", whole(path, room)) ? -1 : real(path); }
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir); char room[PATH_MAX * 2]; return fails("folder", whole(path, room)) ? -1 : real(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat); return fails_at("folder", folder, path) ? -1 : real(folder, path, mode); }
