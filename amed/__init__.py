"""What is learned: the predictor, its settings, the trainer and the experiment folders."""
