//! Library and commands for people: generate, chat, status.
