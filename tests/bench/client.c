/* The clients of the benchmark: loops small enough that what is measured is the file system, not the loop.
 *
 * usage: client OP ARGUMENTS; prints "name value" lines. Times are taken around the loop only (CLOCK_MONOTONIC),
 * names are read into memory first, and every path is taken relative to one open directory, so that the cost of the
 * client is the same on every system. Anything unexpected (a name that should exist and does not, a short read) ends
 * the program with a message and status 1: a figure from a run that failed must not enter a table.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void report(double seconds, size_t count)
{
	printf("seconds %.9f\ncount %zu\n", seconds, count);
}

struct list {
	char **name;
	size_t count;
};

static struct list read_list(const char *path)
{
	struct list l = { NULL, 0 };
	size_t room = 0;
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &st) < 0)
		die("%s: %s", path, strerror(errno));
	char *text = malloc((size_t)st.st_size + 1);
	if (!text || read(fd, text, (size_t)st.st_size) != st.st_size)
		die("%s: cannot read the list", path);
	close(fd);
	text[st.st_size] = 0;
	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		if (l.count == room) {
			room = room ? room * 2 : 4096;
			l.name = realloc(l.name, room * sizeof *l.name);
			if (!l.name)
				die("out of memory");
		}
		l.name[l.count++] = line;
	}
	if (!l.count)
		die("%s: empty list", path);
	return l;
}

static int open_root(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		die("%s: %s", path, strerror(errno));
	return fd;
}

static char buffer[1 << 20];

static int open_name(int root, const char *name, int flags)
{
	int fd = openat(root, name, flags | O_CLOEXEC, 0644);

	if (fd < 0)
		die("open %s: %s", name, strerror(errno));
	return fd;
}

static void close_name(int fd, const char *name)
{
	if (close(fd) < 0)
		die("close %s: %s", name, strerror(errno));
}

static void write_all(int fd, const char *name, uint64_t bytes)
{
	while (bytes) {
		size_t part = bytes < sizeof buffer ? (size_t)bytes : sizeof buffer;

		if (write(fd, buffer, part) != (ssize_t)part)
			die("write %s: %s", name, strerror(errno));
		bytes -= part;
	}
}

static uint64_t read_all(int fd, const char *name)
{
	uint64_t total = 0;
	ssize_t got;

	while ((got = read(fd, buffer, sizeof buffer)) > 0)
		total += (uint64_t)got;
	if (got < 0)
		die("read %s: %s", name, strerror(errno));
	return total;
}

/* xorshift64: the same sequence on every system */
static uint64_t seed = 88172645463325252ULL;

static uint64_t next_random(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	return seed ^= seed << 17;
}

static void fill_buffer(void)
{
	for (size_t i = 0; i < sizeof buffer; i += 8) {
		uint64_t value = next_random();

		memcpy(buffer + i, &value, 8);
	}
}

/* stat ROOT LIST present|missing: one fstatat for each name */
static void op_stat(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	int missing = !strcmp(a[2], "missing");
	struct stat st;
	double start = now();

	for (size_t i = 0; i < l.count; i++) {
		int failed = fstatat(root, l.name[i], &st, AT_SYMLINK_NOFOLLOW);

		if (missing ? (!failed || errno != ENOENT) : failed)
			die("stat %s: %s", l.name[i], failed ? strerror(errno) : "exists");
	}
	report(now() - start, l.count);
}

/* getattr ROOT LIST: statx with FORCE_SYNC on descriptors already open, so exactly one GETATTR each */
static void op_getattr(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	struct rlimit limit = { 65536, 65536 };

	if (l.count > 4000)
		l.count = 4000;
	setrlimit(RLIMIT_NOFILE, &limit);
	int *fds = malloc(l.count * sizeof *fds);
	for (size_t i = 0; i < l.count; i++)
		fds[i] = open_name(root, l.name[i], O_PATH);
	struct statx stx;
	double start = now();
	for (size_t i = 0; i < l.count; i++)
		if (statx(fds[i], "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &stx) < 0)
			die("statx %s: %s", l.name[i], strerror(errno));
	report(now() - start, l.count);
}

/* open ROOT LIST: open for reading and close */
static void op_open(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	double start = now();

	for (size_t i = 0; i < l.count; i++)
		close_name(open_name(root, l.name[i], O_RDONLY), l.name[i]);
	report(now() - start, l.count);
}

/* read ROOT LIST: open, read to the end, close */
static void op_read(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	uint64_t bytes = 0;
	double start = now();

	for (size_t i = 0; i < l.count; i++) {
		int fd = open_name(root, l.name[i], O_RDONLY);

		bytes += read_all(fd, l.name[i]);
		close_name(fd, l.name[i]);
	}
	report(now() - start, l.count);
	printf("bytes %llu\n", (unsigned long long)bytes);
}

/* create ROOT LIST BYTES: new files of so many bytes */
static void op_create(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	uint64_t bytes = strtoull(a[2], NULL, 10);

	fill_buffer();
	double start = now();
	for (size_t i = 0; i < l.count; i++) {
		int fd = open_name(root, l.name[i], O_WRONLY | O_CREAT | O_EXCL);

		write_all(fd, l.name[i], bytes);
		close_name(fd, l.name[i]);
	}
	report(now() - start, l.count);
}

/* rename ROOT LIST: NAME becomes NAME.r */
static void op_rename(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	char to[4096];
	double start = now();

	for (size_t i = 0; i < l.count; i++) {
		snprintf(to, sizeof to, "%s.r", l.name[i]);
		if (renameat(root, l.name[i], root, to) < 0)
			die("rename %s: %s", l.name[i], strerror(errno));
	}
	report(now() - start, l.count);
}

/* unlink ROOT LIST SUFFIX */
static void op_unlink(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	char name[4096];
	double start = now();

	for (size_t i = 0; i < l.count; i++) {
		snprintf(name, sizeof name, "%s%s", l.name[i], a[2]);
		if (unlinkat(root, name, 0) < 0)
			die("unlink %s: %s", name, strerror(errno));
	}
	report(now() - start, l.count);
}

/* chmod ROOT LIST MODE: octal, one fchmodat for each name */
static void op_chmod(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	mode_t mode = (mode_t)strtoul(a[2], NULL, 8);
	double start = now();

	for (size_t i = 0; i < l.count; i++)
		if (fchmodat(root, l.name[i], mode, 0) < 0)
			die("chmod %s: %s", l.name[i], strerror(errno));
	report(now() - start, l.count);
}

/* evict ROOT LIST: what the page cache has of these files is dropped, of no others (clean pages only: sync first) */
static void op_evict(char **a)
{
	int root = open_root(a[0]);
	struct list l = read_list(a[1]);
	double start = now();

	for (size_t i = 0; i < l.count; i++) {
		int fd = open_name(root, l.name[i], O_RDONLY);

		if ((errno = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)))
			die("fadvise %s: %s", l.name[i], strerror(errno));
		close_name(fd, l.name[i]);
	}
	report(now() - start, l.count);
}

/* readdir DIRECTORY EXPECTED: names only, as `ls -f` reads them */
static void op_readdir(char **a)
{
	size_t expected = strtoull(a[1], NULL, 10), count = 0;
	double start = now();
	DIR *d = opendir(a[0]);

	if (!d)
		die("opendir %s: %s", a[0], strerror(errno));
	for (struct dirent *e; errno = 0, (e = readdir(d));)
		count += e->d_name[0] != '.';
	if (errno || count != expected)
		die("readdir %s: %zu names instead of %zu (%s)", a[0], count, expected, strerror(errno));
	closedir(d);
	report(now() - start, count);
}

/* seqwrite PATH BYTES: blocks of 1 MiB, created or written over; no fsync (the disk is not what is compared) */
static void op_seqwrite(char **a)
{
	fill_buffer();
	double start = now();
	int fd = open_name(AT_FDCWD, a[0], O_WRONLY | O_CREAT);

	write_all(fd, a[0], strtoull(a[1], NULL, 10));
	close_name(fd, a[0]);
	report(now() - start, 1);
}

/* seqread PATH: blocks of 1 MiB */
static void op_seqread(char **a)
{
	double start = now();
	int fd = open_name(AT_FDCWD, a[0], O_RDONLY);
	uint64_t bytes = read_all(fd, a[0]);

	close_name(fd, a[0]);
	report(now() - start, 1);
	printf("bytes %llu\n", (unsigned long long)bytes);
}

/* random PATH COUNT read|write: 4 KiB at random places, read-ahead off */
static void op_random(char **a)
{
	size_t count = strtoull(a[1], NULL, 10);
	int writing = !strcmp(a[2], "write");
	int fd = open_name(AT_FDCWD, a[0], writing ? O_RDWR : O_RDONLY);
	struct stat st;

	if (fstat(fd, &st) < 0 || st.st_size < 4096)
		die("%s: too small", a[0]);
	posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
	uint64_t blocks = (uint64_t)st.st_size / 4096;
	double start = now();
	for (size_t i = 0; i < count; i++) {
		off_t at = (off_t)(next_random() % blocks * 4096);
		ssize_t done = writing ? pwrite(fd, buffer, 4096, at) : pread(fd, buffer, 4096, at);

		if (done != 4096)
			die("%s %s: %s", a[2], a[0], strerror(errno));
	}
	close_name(fd, a[0]);
	report(now() - start, count);
}

/* firstwrite PATH: what the first byte written to a file of a lower branch costs */
static void op_firstwrite(char **a)
{
	double start = now();
	int fd = open_name(AT_FDCWD, a[0], O_RDWR);

	if (pwrite(fd, "x", 1, 0) != 1)
		die("write %s: %s", a[0], strerror(errno));
	close_name(fd, a[0]);
	report(now() - start, 1);
}

static int compare(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

/* Run a command to its end, its output thrown away. */
static void run(char **command)
{
	int status;
	pid_t pid = fork();

	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (!pid) {
		int null = open("/dev/null", O_WRONLY);

		dup2(null, 1);
		execvp(command[0], command);
		_exit(127);
	}
	if (waitpid(pid, &status, 0) < 0 || status)
		die("%s: failed beside the clients", command[0]);
}

/* storm ROOT LIST CLIENTS SECONDS [COMMAND...]: so many processes open, read and close files picked at random, for
 * SECONDS or, with COMMAND, as long as that runs (at least 0.2 s). Latencies in microseconds; "worst" is the longest any client waited,
 * "slowest_p99" the 99th percentile of the client that has the highest one. */
static void op_storm(char **a)
{
	enum { ROOM = 1 << 20 };
	struct list l = read_list(a[1]);
	size_t clients = strtoull(a[2], NULL, 10), total = 0;
	double seconds = strtod(a[3], NULL);
	struct shared {
		volatile int go, stop;
		size_t done[64];
	} *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	float *latency = mmap(NULL, clients * ROOM * sizeof(float), PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (clients > 64 || s == MAP_FAILED || latency == MAP_FAILED)
		die("storm: cannot set up %zu clients", clients);
	for (size_t c = 0; c < clients; c++) {
		pid_t pid = fork();

		if (pid < 0)
			die("fork: %s", strerror(errno));
		if (pid)
			continue;
		int root = open_root(a[0]);
		size_t n = 0;

		seed += c * 0x9E3779B97F4A7C15ULL;
		while (!s->go)
			usleep(100);
		while (!s->stop && n < ROOM) {
			const char *name = l.name[next_random() % l.count];
			double start = now();
			int fd = open_name(root, name, O_RDONLY);

			read_all(fd, name);
			close_name(fd, name);
			latency[c * ROOM + n++] = (float)((now() - start) * 1e6);
		}
		s->done[c] = n;
		_exit(0);
	}
	usleep(50000);
	double start = now();
	s->go = 1;
	if (a[4])
		run(a + 4);
	double least = a[4] ? 0.2 : seconds, left = start + least - now();
	if (left > 0)
		usleep((useconds_t)(left * 1e6));
	s->stop = 1;
	double elapsed = now() - start;
	int status, failed = 0;
	while (wait(&status) > 0)
		failed |= status;
	if (failed)
		die("storm: a client failed");
	float slowest = 0;
	for (size_t c = 0; c < clients; c++) {
		if (!s->done[c])
			die("storm: a client did nothing in %.1f s", elapsed);
		qsort(latency + c * ROOM, s->done[c], sizeof(float), compare);
		float p99 = latency[c * ROOM + (size_t)((double)s->done[c] * 0.99)];
		slowest = p99 > slowest ? p99 : slowest;
		memmove(latency + total, latency + c * ROOM, s->done[c] * sizeof(float));
		total += s->done[c];
	}
	qsort(latency, total, sizeof(float), compare);
	report(elapsed, total);
	printf("p50 %.1f\np99 %.1f\np99_9 %.1f\nslowest_p99 %.1f\nworst %.1f\n", latency[total / 2],
	       latency[(size_t)((double)total * 0.99)], latency[(size_t)((double)total * 0.999)], slowest, latency[total - 1]);
}

/* changes DIRECTORY RATE: until killed, so many times a second a file is created, written, and removed again */
static void op_changes(char **a)
{
	int root = open_root(a[0]);
	double step = 1 / strtod(a[1], NULL), next = now();
	char name[64];

	for (unsigned i = 0;; i++) {
		snprintf(name, sizeof name, "storm%u", i % 1000);
		int fd = open_name(root, name, O_WRONLY | O_CREAT);
		write_all(fd, name, 1);
		close_name(fd, name);
		if (unlinkat(root, name, 0) < 0)
			die("unlink %s: %s", name, strerror(errno));
		next += step;
		double wait = next - now();
		if (wait > 0)
			usleep((useconds_t)(wait * 1e6));
	}
}

static const struct operation {
	const char *name;
	int arguments;
	void (*run)(char **);
} operations[] = {
	{ "stat", 3, op_stat },		{ "getattr", 2, op_getattr },	    { "open", 2, op_open },
	{ "read", 2, op_read },		{ "create", 3, op_create },	    { "rename", 2, op_rename },
	{ "unlink", 3, op_unlink },	{ "readdir", 2, op_readdir },	    { "seqwrite", 2, op_seqwrite },
	{ "seqread", 1, op_seqread },	{ "random", 3, op_random },	    { "firstwrite", 1, op_firstwrite },
	{ "storm", 4, op_storm },	{ "changes", 2, op_changes },	    { "chmod", 3, op_chmod },
	{ "evict", 2, op_evict },
};

int main(int argc, char **argv)
{
	for (size_t i = 0; argc > 1 && i < sizeof operations / sizeof *operations; i++)
		if (!strcmp(argv[1], operations[i].name) && argc - 2 >= operations[i].arguments) {
			operations[i].run(argv + 2);
			return 0;
		}
	die("usage: client OP ARGUMENTS");
}
