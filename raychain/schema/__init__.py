"""What the parts of an experiment file are made of: components, durations, caption keys, problems, YAML."""
