"""Tables, plots and pages made from a results file; nothing here runs a model."""
