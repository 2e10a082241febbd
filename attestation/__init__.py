"""attestation: see ARCHITECTURE.md."""
