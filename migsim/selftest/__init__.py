"""The kernel's KVM performance selftests on the cost model: the same options, phases and lines, at any size."""
