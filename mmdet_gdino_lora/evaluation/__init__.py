"""What metrics of mmdet's need to end on today's packages."""
