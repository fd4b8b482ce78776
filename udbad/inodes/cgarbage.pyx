# What garbage.py cannot say in Python. Used where the hot modules are compiled.

cdef extern from "Python.h":
    void PyObject_GC_UnTrack(object one)


def pass_over(object one not None):
    PyObject_GC_UnTrack(one)
