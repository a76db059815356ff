"""What networks do while they learn and run, as pictures: `tenuto diagnose`, docs/networks.md."""
