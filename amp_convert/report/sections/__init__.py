"""What the reports say, section by section, apart from how they look."""
