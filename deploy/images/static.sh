#!/bin/sh
# A compiler for cargo (RUSTC_WORKSPACE_WRAPPER) that makes static programs: static.sh RUSTC ARGUMENT…
# Only the programs' own crates get the options, so all libraries of an ordinary build are used again.
case " $* " in
  # Cargo's question about what the target can do.
  *" --print"*) ;;
  *" --crate-type bin "*) exec "$@" -C target-feature=+crt-static -C strip=symbols ;;
esac
exec "$@"
