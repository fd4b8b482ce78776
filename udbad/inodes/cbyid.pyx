# byid.ById without an object for each number, and in a third of the memory: a node says its number itself, so that one
# pointer is enough. Open addressing, linear probing, and what is behind a gap is moved into it (Knuth, The Art of
# Computer Programming 6.4, algorithm R); never more than two thirds full. Used where the hot modules are compiled.

cimport cython
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint64_t

from udbad.inodes.node cimport Node

cdef int LEAST = 4


cdef inline uint64_t number_of(PyObject *node) noexcept:
    return (<Node>node).id


cdef inline size_t home_of(uint64_t number, int shift) noexcept:
    """Fibonacci hashing: numbers mostly follow each other, or differ in a few of their high bits."""
    return <size_t>((number * <uint64_t>0x9E3779B97F4A7C15) >> shift)


@cython.final
@cython.no_gc  # nobody looks for garbage through nodes (garbage.py)
cdef class ById:
    """By their ids, all that are known; of the methods of a dictionary those that are needed."""

    def __cinit__(self):
        self._count = 0
        self._places = NULL
        self._resize(LEAST)

    def __dealloc__(self):
        cdef size_t at
        if self._places != NULL:
            for at in range(self._mask + 1):
                if self._places[at] != NULL:
                    Py_DECREF(<object>self._places[at])
            PyMem_Free(self._places)

    cdef size_t _place(self, uint64_t number) noexcept:
        """Where the node with this number is, or would be."""
        cdef size_t at = home_of(number, self._shift)
        while self._places[at] != NULL and number_of(self._places[at]) != number:
            at = (at + 1) & self._mask
        return at

    cdef int _resize(self, int bits) except -1:
        """Have 2**bits places."""
        cdef PyObject **before = self._places
        cdef size_t at, many = self._mask + 1 if before != NULL else 0
        cdef PyObject **made = <PyObject **>PyMem_Calloc(<size_t>1 << bits, sizeof(PyObject *))
        if made == NULL:
            raise MemoryError
        self._places, self._mask, self._shift = made, (<size_t>1 << bits) - 1, 64 - bits
        for at in range(many):
            if before[at] != NULL:
                made[self._place(number_of(before[at]))] = before[at]
        PyMem_Free(before)
        return 0

    cdef object _found(self, uint64_t number):
        cdef PyObject *node = self._places[self._place(number)]
        return None if node == NULL else <object>node

    cpdef get(self, uint64_t number):
        return self._found(number)

    def __getitem__(self, number):
        node = self._found(number)
        if node is None:
            raise KeyError(number)
        return node

    def __contains__(self, number):
        return self._found(number) is not None

    def __len__(self):
        return self._count

    def values(self):
        """As they are now, whatever becomes of them meanwhile."""
        cdef list found = []
        cdef size_t at
        for at in range(self._mask + 1):
            if self._places[at] != NULL:
                found.append(<object>self._places[at])
        return found

    def keys(self):
        cdef Node node
        return [node.id for node in self.values()]

    def items(self):
        cdef Node node
        return [(node.id, node) for node in self.values()]

    def __iter__(self):
        return iter(self.keys())

    cpdef add(self, one):
        """Instead of another one with its number, if there is one."""
        cdef Node node = <Node?>one
        cdef size_t at
        cdef PyObject *before
        if 3 * (self._count + 1) > 2 * (self._mask + 1):
            self._resize(65 - self._shift)
        at = self._place(node.id)
        before = self._places[at]
        Py_INCREF(node)
        self._places[at] = <PyObject *>node
        if before != NULL:
            Py_DECREF(<object>before)
        else:
            self._count += 1

    cpdef remove(self, one):
        """Raises KeyError when it is not there, or another one is."""
        cdef Node node = <Node?>one
        cdef size_t gap = self._place(node.id)
        cdef size_t at = gap, home
        if self._places[gap] != <PyObject *>node:
            raise KeyError(node.id)
        while True:
            at = (at + 1) & self._mask
            if self._places[at] == NULL:
                break
            home = home_of(number_of(self._places[at]), self._shift)
            if ((at - home) & self._mask) >= ((at - gap) & self._mask):  # it would not be found behind the gap
                self._places[gap] = self._places[at]
                gap = at
        self._places[gap] = NULL
        self._count -= 1
        Py_DECREF(node)

    def shrunk(self):
        """The same, without room for many more."""
        cdef int bits = LEAST
        while 3 * (self._count + 1) > 2 * (<size_t>1 << bits):
            bits += 1
        if bits < 64 - self._shift:
            self._resize(bits)
        return self
