# What echoes.py does, for events that come with each change of ours. Used where the hot modules are compiled.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromString, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memmove, strlen

from udbad.branch.clisting cimport inotify_event

cdef const char *NO_NAME = ""

cdef struct sent_event:
    int watch
    uint32_t mask
    PyObject *name  # bytes, of which this is a reference


cdef class Expected:
    """In the order they were sent, which is that in which they come: the first of them is nearly always the one."""
    cdef sent_event *sent
    cdef Py_ssize_t first, end, room

    def __dealloc__(self):
        self.clear()
        free(self.sent)

    def __len__(self):
        return self.end - self.first

    cpdef add(self, object watch, uint32_t mask, bytes name):
        cdef sent_event *more
        if type(watch) is not int:
            return
        cdef int number = watch
        if name is None:
            raise TypeError("no name")
        if self.end == self.room:
            if 2 * self.first > self.room:  # what has come makes room
                memmove(self.sent, self.sent + self.first, (self.end - self.first) * sizeof(sent_event))
                self.end -= self.first
                self.first = 0
            else:
                more = <sent_event *>realloc(self.sent, (2 * self.room + 64) * sizeof(sent_event))
                if more == NULL:
                    raise MemoryError
                self.sent = more
                self.room = 2 * self.room + 64
        Py_INCREF(name)
        self.sent[self.end].watch, self.sent[self.end].mask = number, mask
        self.sent[self.end].name = <PyObject *>name
        self.end += 1

    cpdef clear(self):
        cdef Py_ssize_t each, first = self.first, end = self.end
        self.first = self.end = 0
        for each in range(first, end):
            Py_DECREF(<object>self.sent[each].name)

    cdef bint take(self, int watch, uint32_t mask, const char *name, Py_ssize_t length):
        """Whether such an event was sent, which then has come."""
        cdef Py_ssize_t each
        cdef sent_event *at
        for each in range(self.first, self.end):
            at = &self.sent[each]
            if at.watch != watch or at.mask != mask or PyBytes_GET_SIZE(<object>at.name) != length:
                continue
            if memcmp(PyBytes_AS_STRING(<object>at.name), name, length):
                continue
            Py_DECREF(<object>at.name)
            memmove(self.sent + self.first + 1, self.sent + self.first, (each - self.first) * sizeof(sent_event))
            self.first += 1
            if self.first == self.end:
                self.first = self.end = 0
            return True
        return False

    def sift(self, bytes data not None):
        cdef const char *at = PyBytes_AS_STRING(data)
        cdef const char *end = at + PyBytes_GET_SIZE(data)
        cdef const char *name
        cdef inotify_event *event
        cdef Py_ssize_t count = 0
        cdef list others = []
        cdef dict echoes = {}
        while at < end:
            event = <inotify_event *>at
            at += sizeof(inotify_event) + event.len
            count += 1
            name = event.name if event.len else NO_NAME
            if self.first != self.end and self.take(event.wd, event.mask, name, strlen(name)):
                echoes[event.wd] = echoes.get(event.wd, 0) + 1
            else:
                others.append((event.wd, event.mask, PyBytes_FromString(name)))
        return count, others, echoes
