/* The recorder's guest: fills memory with data, then writes pages at a steady pace and counts what it does.
 *
 * `orders` lies at the start of the image; the recorder fills it in. `journal` lies in guest page 1 and is read by the
 * recorder through the monitor. One page write changes `bytes_per_write` bytes of one page; the pace is kept against
 * the time-stamp counter. Time the guest could not run is lost unless `make_up` is set.
 */
typedef unsigned char byte;
typedef unsigned int word;
typedef unsigned long long wide;

struct orders {
    byte name[4];            /* "MSG2" */
    word first_page;         /* of the data, and of the working set */
    word data_pages;
    word working_set_pages;
    word order;              /* 0 one after the other, 1 uniform, 2 hot and cold */
    word bytes_per_write;    /* a power of two, 4 .. 4096 */
    word make_up;
    word seed;
    wide ticks_per_write;    /* 0: no writes */
    wide ticks_forgiven;     /* how far behind it may fall before time counts as lost */
    word hot_share_pct;      /* order 2: of the pages */
    word hot_writes_pct;     /* order 2: of the writes */
};

struct journal {
    byte name[4];            /* "MSJ2" */
    word stage;              /* 1 filling, 2 writing */
    wide writes;
    wide stumbles;           /* how often time was lost */
    wide lost_ticks;
    wide fill_began, fill_ended, last_write;
};

__attribute__((section(".orders"), used)) volatile const struct orders orders = {.name = "MSG2"};
static volatile struct journal *const journal = (volatile struct journal *)0x1000;

static wide ticks(void)
{
    word low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (wide)high << 32 | low;
}

/* Marsaglia's multiply-with-carry: state in 64 bits, 32 of them out. */
static word draw(wide *state)
{
    *state = (*state & 0xffffffffu) * 4294957665u + (*state >> 32);
    return (word)*state;
}

static word below(wide *state, word limit)
{
    return (word)((wide)draw(state) * limit >> 32);
}

static void fill(wide *state)
{
    word *at = (word *)(orders.first_page << 12);
    word *end = (word *)((orders.first_page + orders.data_pages) << 12);
    while (at < end)
        *at++ = draw(state) | 1;             /* never zero: no page of data may look empty */
}

static word choose(wide *state, word *next, word hot)
{
    word pages = orders.working_set_pages;
    if (orders.order == 0) {
        word page = *next;
        *next = page + 1 == pages ? 0 : page + 1;
        return page;
    }
    if (orders.order == 1 || !hot)
        return below(state, pages);
    if (below(state, 100) < orders.hot_writes_pct)
        return below(state, hot);
    return hot + below(state, pages - hot);
}

static void store(wide *state, word page)
{
    word size = orders.bytes_per_write;
    word offset = below(state, 4096 / size) * size;
    volatile word *at = (volatile word *)(((orders.first_page + page) << 12) + offset);
    for (word i = 0; i < size / 4; i++)
        at[i] = draw(state);
}

void writer(void)
{
    wide state = (wide)orders.seed << 20 | 0x5eed1;
    word next = 0, hot = orders.working_set_pages / 100 * orders.hot_share_pct;
    journal->fill_began = ticks();
    journal->stage = 1;
    for (int i = 0; i < 4; i++)
        journal->name[i] = (byte)"MSJ2"[i];
    fill(&state);
    wide due = ticks();
    journal->fill_ended = due;
    journal->stage = 2;
    if (!orders.ticks_per_write || !orders.working_set_pages)
        return;
    for (;;) {
        wide now = ticks();
        if (now < due) {
            __asm__ volatile("pause");
            continue;
        }
        if (!orders.make_up && now - due > orders.ticks_forgiven) {
            journal->lost_ticks += now - due;
            journal->stumbles++;
            due = now;
        }
        due += orders.ticks_per_write;
        store(&state, choose(&state, &next, hot));
        journal->last_write = now;
        journal->writes++;
    }
}
