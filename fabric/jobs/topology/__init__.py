"""From the measured links of a job's members to islands and levels."""
