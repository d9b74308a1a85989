//! Small collectives, written out by hand.

use annulus::schedule::{Action, Algorithm, Collective, Phase, Schedule, Span, Step, Transfer};

/// `index phase send recv action`, e.g. `0 rs 1:2@4+2 2:1@2+2 Reduce`: step 0, send chunk 2 (elements 4..6) to rank 1,
/// receive chunk 1 (elements 2..4) from rank 2.
fn show(step: &Step) -> String {
    let phase = match step.phase {
        Phase::ReduceScatter => "rs",
        Phase::AllGather => "ag",
        Phase::Broadcast => "bc",
    };
    let transfer = |transfer: Option<Transfer>| match transfer {
        Some(Transfer { peer, chunk, span: Span { offset_elems, len_elems } }) => {
            format!("{peer}:{chunk}@{offset_elems}+{len_elems}")
        }
        None => "-".into(),
    };
    let action = match step.action {
        Some(Action::Copy) => "Copy",
        Some(Action::Reduce) => "Reduce",
        Some(Action::Hold) => "Hold",
        Some(Action::Finish) => "Finish",
        None => "-",
    };
    format!("{} {phase} {} {} {action}", step.index, transfer(step.send), transfer(step.recv))
}

fn shown(schedule: &Schedule, rank: u32, round: u64) -> Vec<String> {
    schedule.steps(rank, round).map(|step| show(&step)).collect()
}

#[test]
fn ring_all_reduce_of_three() {
    let plan = Schedule::new(Collective::AllReduce, Algorithm::Ring, 3, 6, 2, 1).unwrap();
    assert_eq!(plan.rounds(), 1);
    let expected = [
        [
            "0 rs 1:2@4+2 2:1@2+2 Reduce",
            "1 rs 1:1@2+2 2:0@0+2 Finish",
            "2 ag 1:0@0+2 2:2@4+2 Copy",
            "3 ag 1:2@4+2 2:1@2+2 Copy",
        ],
        [
            "0 rs 2:0@0+2 0:2@4+2 Reduce",
            "1 rs 2:2@4+2 0:1@2+2 Finish",
            "2 ag 2:1@2+2 0:0@0+2 Copy",
            "3 ag 2:0@0+2 0:2@4+2 Copy",
        ],
        [
            "0 rs 0:1@2+2 1:0@0+2 Reduce",
            "1 rs 0:0@0+2 1:2@4+2 Finish",
            "2 ag 0:2@4+2 1:1@2+2 Copy",
            "3 ag 0:1@2+2 1:0@0+2 Copy",
        ],
    ];
    for (rank, expected) in (0..).zip(expected) {
        assert_eq!(shown(&plan, rank, 0), expected, "rank {rank}");
    }
}

#[test]
fn direct_all_reduce_of_three() {
    let plan = Schedule::new(Collective::AllReduce, Algorithm::Direct, 3, 6, 2, 1).unwrap();
    let expected = [
        [
            "0 rs 1:1@2+2 2:0@0+2 Hold",
            "1 rs 2:2@4+2 1:0@0+2 Finish",
            "2 ag 1:0@0+2 2:2@4+2 Copy",
            "3 ag 2:0@0+2 1:1@2+2 Copy",
        ],
        [
            "0 rs 2:2@4+2 0:1@2+2 Hold",
            "1 rs 0:0@0+2 2:1@2+2 Finish",
            "2 ag 2:1@2+2 0:0@0+2 Copy",
            "3 ag 0:1@2+2 2:2@4+2 Copy",
        ],
        [
            "0 rs 0:0@0+2 1:2@4+2 Hold",
            "1 rs 1:1@2+2 0:2@4+2 Finish",
            "2 ag 0:2@4+2 1:1@2+2 Copy",
            "3 ag 1:2@4+2 0:0@0+2 Copy",
        ],
    ];
    for (rank, expected) in (0..).zip(expected) {
        assert_eq!(shown(&plan, rank, 0), expected, "rank {rank}");
    }
}

#[test]
fn all_reduce_of_two_is_one_exchange_each_way() {
    let ring = Schedule::new(Collective::AllReduce, Algorithm::Ring, 2, 5, 8, 1).unwrap();
    assert_eq!(shown(&ring, 0, 0), ["0 rs 1:1@3+2 1:0@0+3 Finish", "1 ag 1:0@0+3 1:1@3+2 Copy"]);
    assert_eq!(shown(&ring, 1, 0), ["0 rs 0:0@0+3 0:1@3+2 Finish", "1 ag 0:1@3+2 0:0@0+3 Copy"]);
    let direct = Schedule::new(Collective::AllReduce, Algorithm::Direct, 2, 5, 8, 1).unwrap();
    for rank in 0..2 {
        assert_eq!(shown(&direct, rank, 0), shown(&ring, rank, 0), "two ranks have only one way");
    }
}

#[test]
fn shares_of_a_reduction_alone() {
    let scatter = Schedule::new(Collective::ReduceScatter, Algorithm::Ring, 3, 9, 2, 1).unwrap();
    assert_eq!(scatter.rounds(), 2);
    assert_eq!(shown(&scatter, 0, 0), ["0 rs 1:2@6+2 2:1@3+2 Reduce", "1 rs 1:1@3+2 2:0@0+2 Finish"]);
    assert_eq!(shown(&scatter, 0, 1), ["0 rs 1:2@8+1 2:1@5+1 Reduce", "1 rs 1:1@5+1 2:0@2+1 Finish"]);
    let gather = Schedule::new(Collective::AllGather, Algorithm::Direct, 3, 9, 3, 1).unwrap();
    assert_eq!(shown(&gather, 2, 0), ["0 ag 0:2@6+3 1:1@3+3 Copy", "1 ag 1:2@6+3 0:0@0+3 Copy"]);
}

#[test]
fn broadcast_of_four_from_two() {
    let chain = Schedule::new(Collective::Broadcast { root: 2 }, Algorithm::Ring, 4, 5, 3, 1).unwrap();
    assert_eq!(chain.rounds(), 2);
    assert_eq!(shown(&chain, 2, 0), ["0 bc 3:2@0+3 - -"]);
    assert_eq!(shown(&chain, 3, 0), ["0 bc - 2:2@0+3 Copy", "1 bc 0:2@0+3 - -"]);
    assert_eq!(shown(&chain, 0, 1), ["1 bc - 3:2@3+2 Copy", "2 bc 1:2@3+2 - -"]);
    assert_eq!(shown(&chain, 1, 1), ["2 bc - 0:2@3+2 Copy"]);
    let star = Schedule::new(Collective::Broadcast { root: 2 }, Algorithm::Direct, 4, 5, 5, 1).unwrap();
    assert_eq!(shown(&star, 2, 0), ["0 bc 3:2@0+5 - -", "1 bc 0:2@0+5 - -", "2 bc 1:2@0+5 - -"]);
    assert_eq!(shown(&star, 3, 0), ["0 bc - 2:2@0+5 Copy"]);
    assert_eq!(shown(&star, 1, 0), ["2 bc - 2:2@0+5 Copy"]);
}

#[test]
fn a_world_of_one_finishes_and_sends_nothing() {
    for algorithm in [Algorithm::Ring, Algorithm::Direct] {
        let plan = |collective| Schedule::new(collective, algorithm, 1, 5, 3, 1).unwrap();
        for collective in [Collective::AllReduce, Collective::ReduceScatter] {
            assert_eq!(plan(collective).rounds(), 2);
            assert_eq!(shown(&plan(collective), 0, 1), ["0 rs - - Finish"]);
            assert_eq!(plan(collective).chunk(1, 0), Span { offset_elems: 3, len_elems: 2 });
        }
        for collective in [Collective::AllGather, Collective::Broadcast { root: 0 }] {
            assert_eq!(plan(collective).rounds(), 2);
            assert_eq!(plan(collective).steps(0, 0).len(), 0);
        }
    }
}

#[test]
fn shards_are_whole_blocks_and_differ_by_one() {
    let shards = |len_elems, align_elems| {
        let plan = Schedule::new(Collective::AllReduce, Algorithm::Ring, 4, len_elems, 100, align_elems).unwrap();
        [0, 1, 2, 3].map(|owner| (plan.shard(owner).offset_elems, plan.shard(owner).len_elems))
    };
    assert_eq!(shards(10, 1), [(0, 3), (3, 3), (6, 2), (8, 2)]);
    assert_eq!(shards(10, 4), [(0, 4), (4, 4), (8, 2), (10, 0)]);
    assert_eq!(shards(40, 4), [(0, 12), (12, 12), (24, 8), (32, 8)]);
    assert_eq!(shards(3, 16), [(0, 3), (3, 0), (3, 0), (3, 0)]);
    assert_eq!(shards(0, 16), [(0, 0); 4]);
}

#[test]
fn what_cannot_be_planned_is_refused_by_name() {
    let refusal = |collective, world_size, len_elems, round_elems, align_elems| {
        Schedule::new(collective, Algorithm::Direct, world_size, len_elems, round_elems, align_elems)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refusal(Collective::AllReduce, 0, 1, 1, 1), "world_size is 0: a world has 1..=64 ranks");
    assert_eq!(refusal(Collective::AllReduce, 65, 1, 1, 1), "world_size is 65: a world has 1..=64 ranks");
    assert_eq!(refusal(Collective::AllReduce, 2, 1, 0, 1), "round_elems is 0: a round moves at least 1 element");
    assert_eq!(refusal(Collective::AllReduce, 2, 1, 1, 0), "align_elems is 0: the alignment is at least 1 element");
    assert_eq!(
        refusal(Collective::Broadcast { root: 2 }, 2, 1, 1, 1),
        "root is 2: the root is a rank below the world size"
    );
    for collective in [Collective::ReduceScatter, Collective::AllGather] {
        assert_eq!(refusal(collective, 3, 10, 1, 1), "len_elems is 10: it must be a multiple of the world size");
    }
    assert_eq!(
        refusal(Collective::Broadcast { root: 0 }, 3, usize::MAX, 1, 1),
        format!(
            "the elements that one rank sends overflows the address space: \
             Broadcast {{ root: 0 }} by Direct of {} elements over 3 ranks",
            usize::MAX
        )
    );
}
