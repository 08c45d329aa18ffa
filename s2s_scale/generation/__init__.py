"""Text generation: streams of lines, searches in fixed shapes, and other engines."""
