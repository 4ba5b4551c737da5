"""Stage folders as other libraries load them: converted, loaded back by the library, compared, and only then kept."""
