# How readdir.Run is gone through, for kernel/cwire.pyx. Used where the hot modules are compiled.

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItemWithError
from cpython.ref cimport PyObject
from libc.string cimport memcmp

from udbad.inodes.cnames cimport Names, block_t, entry_t, uppermost
from udbad.inodes.node cimport Node
from udbad.union.readdir cimport Run


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
        if run.children:
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
