"""Is dirty logging correct?  Suites, a differential tester and seeded bugs, over the emulator and the real KVM."""
