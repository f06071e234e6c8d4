"""What looks at a run as it goes on: bar, samples, passports, prompts, charts, trackers."""
