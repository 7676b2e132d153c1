"""How fast a mixture is: loraweave, its peers and the floor, timed in one process and interleaved."""
