// Takes SIGTERM as soon as the program has claimed it, as a library may that is loaded later.

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

static void *take(void *unused) {
    struct sigaction found;
    do {
        usleep(1000);
        sigaction(SIGTERM, NULL, &found);
    } while (found.sa_handler == SIG_DFL);
    signal(SIGTERM, SIG_IGN);
    fputs("SIGTERM is taken\n", stderr);
    return unused;
}

__attribute__((constructor)) static void start(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, take, NULL);
}
