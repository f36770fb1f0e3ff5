"""Published reports of attention kernels, tried on this machine."""
