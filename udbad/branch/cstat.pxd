from posix.time cimport timespec

cdef extern from "<sys/stat.h>" nogil:
    struct stat_t "stat":
        unsigned long long st_dev, st_ino, st_nlink, st_rdev
        unsigned int st_mode, st_uid, st_gid
        long long st_size, st_blocks, st_blksize
        timespec st_atim, st_mtim, st_ctim
    int fstat_c "fstat"(int fd, stat_t *status)
    int fstatat_c "fstatat"(int dirfd, const char *path, stat_t *status, int flags)

cdef class Status:
    cdef stat_t c
    cdef readonly unsigned long long st_dev, st_ino
    cdef readonly unsigned int st_mode

cdef enum:
    CTIME, MTIME, SIZE, LINKS

cdef class Stamp:
    cdef unsigned long long[4] words

cpdef Status stat_at(int dirfd, bytes name)
cpdef Status find_at(int dirfd, bytes name)
cpdef unsigned int mode_at(int dirfd, bytes name) except? 1
cpdef Status fstat(int fd)
cpdef object stamp(object st)
cpdef bint has_one_name(Stamp one) except -1
cpdef object lasting_stamp(object branch, object st)
cdef int fill(stat_t *c, object st) except -1
