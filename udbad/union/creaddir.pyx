# How readdir.Run is gone through, for kernel/cwire.pyx. Used where the hot modules are compiled.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItemWithError
from cpython.ref cimport PyObject
from libc.stdint cimport uint64_t
from libc.string cimport memcmp, memcpy, memset

from udbad.inodes.cnames cimport Names, block_t, entry_t, uppermost
from udbad.inodes.node cimport Node
from udbad.union.readdir cimport Run


cdef inline size_t mark_of(const char *name, Py_ssize_t size) noexcept nogil:
    """One of the 4,096 bits of `Run.likely`, by the end of a name, in which those of a directory differ most."""
    cdef uint64_t end = 0
    memcpy(&end, name + max(size - 8, 0), min(size, 8))
    return <size_t>((end + <uint64_t>size) * <uint64_t>0x9E3779B97F4A7C15 >> 52)


cdef inline bint is_likely(Run run, name_t *name) except -1:
    """Whether the kernel may know a name."""
    cdef size_t mark = mark_of(name.text, name.size)
    if not run.knows_likely:
        note_likely(run)
    return run.likely[mark >> 3] >> (mark & 7) & 1


cdef int note_likely(Run run) except -1:
    """Which names the kernel may know: of most it can be said without asking `children`, for which each would have to
    be an object."""
    cdef size_t mark
    memset(run.likely, 0, sizeof(run.likely))
    for name in run.children:
        mark = mark_of(PyBytes_AS_STRING(<bytes?>name), PyBytes_GET_SIZE(name))
        run.likely[mark >> 3] |= 1 << (mark & 7)
    run.knows_likely = True
    return 0


cdef bint find_next(Run run, name_t *name) except -1:
    """The name at `first`, which goes past those that are gone; False: it has to be asked for, or there is none."""
    cdef Names current = run.current
    cdef block_t *block
    cdef entry_t *entry
    cdef PyObject *child
    cdef Py_ssize_t top
    run.names.settle()
    block = run.names.block
    while 0 <= run.first < block.count:
        entry = block.entries + run.first
        name.text, name.size = block.text + entry.at, entry.rest >> 4
        if name.size >= 4 and memcmp(name.text, b".wh.", 4) == 0:
            return False
        if current.block != block:
            entry = current.look(name.text, name.size)
            if entry == NULL:
                run.first += 1
                continue
        if not entry.hit:
            return False
        if run.children and is_likely(run, name):
            child = PyDict_GetItemWithError(run.children, PyBytes_FromStringAndSize(name.text, name.size))
            if child != NULL:
                name.number, name.kind = (<Node?>child).id, (<Node?>child).kind
                return True
        name.kind = (entry.rest & 15) << 12
        if not name.kind:
            return False
        top = uppermost(entry.hit)
        if top == run.index and 1 < entry.number < run.limit and not run.lowest <= entry.number <= run.highest:
            name.number = run.base + entry.number
        else:
            name.number = run.number(top, entry.number)
        return name.number != 0
    return False
