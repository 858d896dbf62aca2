"""Where the figures come from: ``python -m benchmarks`` measures them on the machine it runs on."""
