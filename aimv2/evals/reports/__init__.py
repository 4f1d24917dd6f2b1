"""Tables, plots and comparisons of the results of evaluations."""
