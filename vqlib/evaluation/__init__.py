"""Images from anywhere -> features -> metrics."""
