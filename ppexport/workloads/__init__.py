"""What ``eval`` and ``bench`` can ask: synthetic screens, and questions of the user's own."""
