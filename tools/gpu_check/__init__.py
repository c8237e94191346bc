"""What the tests show on a CPU, checked on a GPU."""
