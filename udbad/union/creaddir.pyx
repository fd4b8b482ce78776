# The loop of readdir.py over names that nobody has changed. Used where the hot modules are compiled.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Contains, PyDict_GetItemWithError, PyDict_Next
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.ref cimport PyObject
from libc.string cimport memcmp

from udbad.union.view cimport Said

cdef unsigned char DIRECTORY = 4  # S_IFDIR >> 12


def as_said(dict hits not None, list names not None, Said said not None, dict children not None,
            Py_ssize_t first, Py_ssize_t end):
    """readdir._as_said. Names are mostly the keys themselves, in their order: then none is looked for."""
    cdef const unsigned char[::1] types = said.types
    cdef Py_ssize_t at = first
    cdef Py_ssize_t place = first
    cdef bint known = len(children) > 0
    cdef PyObject *key
    cdef PyObject *hit
    cdef PyObject *name
    if first < 0 or end > PyList_GET_SIZE(names) or end > types.shape[0]:
        raise IndexError(end)
    while at < end:
        name = <PyObject *>PyList_GET_ITEM(names, at)
        if not PyDict_Next(hits, &place, &key, &hit) or key != name:
            hit = PyDict_GetItemWithError(hits, <object>name)
        if hit == NULL or <object>hit is None or not types[at]:
            break
        if (type(<object>hit) is tuple) != (types[at] == DIRECTORY):
            break
        if PyBytes_GET_SIZE(<object>name) >= 4 and memcmp(PyBytes_AS_STRING(<object>name), b".wh.", 4) == 0:
            break
        if known and PyDict_Contains(children, <object>name):
            break
        at += 1
    return at
