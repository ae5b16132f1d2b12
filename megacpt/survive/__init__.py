"""How a run outlives what fails around it: ownership, heartbeat's watchdog, restarts, bad numbers."""
