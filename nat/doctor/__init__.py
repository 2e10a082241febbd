"""The doctor: facts in, findings with next steps out."""
