"""The commands. Start-up stays light: torch and Lightning are imported only once a command really runs."""
