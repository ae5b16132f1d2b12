"""AdamW, clipping and schedules on the token clock."""
