from udbad.edge.operations cimport Operations
from udbad.inodes.table cimport Node
from udbad.kernel.received cimport Received
