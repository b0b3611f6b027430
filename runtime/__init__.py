"""What both scripts need and neither is about."""
