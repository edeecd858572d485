"""Work on runs: checks, execution, campaigns, estimates, forks, labels, SAE training and the doctor."""
