"""What a run of the simulator tells: verdict, figures, plots."""
