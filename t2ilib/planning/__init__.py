"""What a run will need, traced: advice on top of training, which nothing below asks for."""
