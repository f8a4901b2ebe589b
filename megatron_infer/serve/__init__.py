"""The completion server: five dialects over one session."""
