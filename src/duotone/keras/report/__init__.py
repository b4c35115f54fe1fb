"""What a run tells of its loss scale, and how it ends where no scale helps."""
