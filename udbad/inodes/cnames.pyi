from udbad.inodes.names import Names as Names
