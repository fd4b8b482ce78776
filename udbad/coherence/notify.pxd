from udbad.coherence.watches cimport Watches
from udbad.branch.cstat cimport has_one_name, lasting_stamp
from udbad.coherence.base cimport in_trusted
from udbad.coherence.sent cimport SentAttributes
from udbad.inodes.node cimport Dir, Node
from udbad.union.superblock cimport Superblock
