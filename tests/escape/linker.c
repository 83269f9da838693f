/* A dynamic linker that is the tenant's: opens the program that it was to load for writing, and exits with the errno. */
static long call(long number, long a, long b, long c, long d) {
    long result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return result;
}

void _start(void) {
    static const char self[] = "/proc/self/exe";
    long result = call(257, -100, (long)self, 2, 0); /* openat, O_RDWR */
    call(231, result < 0 ? -result : 0, 0, 0, 0);    /* exit_group */
}
